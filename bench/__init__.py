"""Speed against a plain implementation of the study's loop: `python -m bench`."""
