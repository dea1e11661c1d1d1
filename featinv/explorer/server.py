"""Serve the page, after checking its address."""

import errno
import logging
import socket

from featinv.explorer.page import CSS, THEME, Page
from featinv.utils.errors import InputError


def check_address(host: str, port: int) -> None:
    """Raise an `InputError` if nothing can be served at an address."""
    if not 1 <= port <= 65535:
        raise InputError(f"port is {port}, expected 1 to 65535, for example 7860.")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            reason = "in use" if error.errno == errno.EADDRINUSE else "reserved for administrators"
            raise InputError(
                f"port is {port}, which is {reason}: expected a free one, for example "
                f"{free_port(host)}."
            ) from error
        raise InputError(
            f"host is '{host}', which is no address of this machine: expected 127.0.0.1 for this "
            "machine only, or 0.0.0.0 for everyone who can reach it."
        ) from error


def free_port(host: str) -> int:
    """Return a port that is free at the moment."""
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]


def launch(page: Page, host: str, port: int) -> str:
    """Start serving in threads of this process; return the address of the page."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio pings its own server
    page.blocks.queue(max_size=32).launch(
        server_name=host,
        server_port=port,
        max_file_size=f"{page.max_upload_mb}mb",
        theme=THEME,
        css=CSS,
        footer_links=[],
        share=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        prevent_thread_lock=True,
        quiet=True,
    )
    return page.blocks.local_url
