"""The doctor: what works on this machine, found by trying it.

- `examination`: what a check is, and how checks run: in processes of their own, which end when their time is up.
- `facts`: versions and devices. `trials`: set-ups, each tried with a tiny model whose answer is known.
- `report`: the list of checks, and their findings as a table or as JSON.

`python -m newtonopt doctor` calls `report`, which has `examination` run the functions of `facts` and `trials`.
"""
