"""A small Restormer trained by this project: its data, its training and its weights."""
