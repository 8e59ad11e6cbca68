"""`tmlc profile`: will it answer in time, where does the time go, what would make it faster?

`inputs.py` makes up what is played, `measure.py` plays it and puts the report together, `parts.py` says which parts
were measured and why others were not, `samples.py` keeps what each tick took, `file.py` writes and reads the JSON form
(`../profile.schema.json`), `view.py` shows it.
"""
