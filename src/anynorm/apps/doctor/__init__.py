"""`anynorm doctor`: the model and data that a user names, the report in the terminal and as a page, and the repairs."""
