"""`tmlc plan`: what a model would take on hardware that is not here (docs/cost-model.md has the formulas).

`work.py` counts the bytes and operations of a tick from a compiled Program, `hardware.py` reads the table of machines,
`predict.py` puts the two together, `view.py` shows the result.
"""
