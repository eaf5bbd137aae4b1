"""Private parts of torch 2.11 to 2.15, by what they concern: no other folder touches any."""
