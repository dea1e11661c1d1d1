"""LightningDataModules: tar shards, class folders, bundled photographs."""

from featinv.data.folder import FolderDataModule
from featinv.data.photographs import PhotosDataModule
from featinv.data.shards import ShardsDataModule

__all__ = ["FolderDataModule", "PhotosDataModule", "ShardsDataModule"]
