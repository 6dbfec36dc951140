"""The five mechanisms as plain `torch.nn` modules: no Lightning, no files, no network access."""
