"""What every op is made with: its definition, its dispatch, its launch plan, rows and tiles."""
