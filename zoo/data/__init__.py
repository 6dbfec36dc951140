"""LightningDataModules, one file per kind of data, and where their files come from."""
