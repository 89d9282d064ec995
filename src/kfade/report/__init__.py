"""From folders of results to one page and its figures; needs no torch."""
