"""What compare.py is made of, beside itself: it may import the scripts of the steps before, which models/ does not."""
