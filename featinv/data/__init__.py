"""LightningDataModules: tar shards, class folders, bundled photographs."""

from featinv.data.folder import FolderDataModule, ImageFiles
from featinv.data.photographs import PhotosDataModule
from featinv.data.shards import ShardsDataModule

__all__ = ["FolderDataModule", "ImageFiles", "PhotosDataModule", "ShardsDataModule"]
