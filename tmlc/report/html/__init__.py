"""The profile as one HTML file that needs nothing else: no network, no script to be read.

`page.py` puts the sections together; each plot has a file of its own and draws itself twice, for a wide window and
for a narrow one, so that its text keeps a readable size. `svg.py` has what they draw with, `report.css` the look.
"""
