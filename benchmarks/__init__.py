"""What anynorm is measured by. A package by name, since others install one of this name beside it."""
