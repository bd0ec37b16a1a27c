"""The branch bench: from one state, the next stage on the data of each method, held-out losses side by side."""
