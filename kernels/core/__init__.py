"""What every op is made with: its definition, its dispatch, its replay, rows and tiles."""
