"""`anynorm monitor FILE`: what `anynorm.Monitor` wrote, as a table and as a page."""
