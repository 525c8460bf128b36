"""What a step needs in memory and time, counted before anything is allocated: needs.py counts, choice.py chooses, check.py tells."""
