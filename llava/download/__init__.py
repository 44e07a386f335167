"""Files of others: what is fetched from where, transfers that resume, safe unpacking, what is there already."""
