"""Importing: folders of images, datasets and tables, as rows that become samples of shards."""
