"""What the recipes share: their configuration tables, how a run is prepared, the rounds of IMP, and the last steps."""
