"""LightningModules, one file per task: loss, metrics, optimizer and what a user holds in hand."""
