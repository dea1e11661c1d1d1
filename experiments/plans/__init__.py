"""The plans of experiments/reproduce.py: the commands for all results of a scale, in order."""

from plans.paper import paper_plan
from plans.small import small_plan

PLANS = {"small": small_plan, "paper": paper_plan}
