"""`anynorm compare`: which normalization should this network use, on this data, at this batch size?"""
