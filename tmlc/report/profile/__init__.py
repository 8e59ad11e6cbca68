"""`tmlc profile`: will it answer in time, where does the time go, what would make it faster?

`inputs.py` makes up what is played, `measure.py` plays it and puts the report together, `parts.py` says which parts
were measured and why others were not. `samples.py` keeps what each tick took and `stages.py` splits it, `kernels.py`
times single kernel calls against the machine's `ceilings.py`, `memory.py` lists what lies in memory. `file.py` writes
and reads the JSON form (`../profile.schema.json`), `view.py` and `kernels_view.py` show it.
"""
