"""Trainers of other projects: callbacks and plugins in their own interfaces, imported where they are asked for."""
