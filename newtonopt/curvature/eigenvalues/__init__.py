"""The largest and smallest eigenvalues of a symmetric operator, each with an interval that holds it.

- `extreme`: `extreme_eigenvalues` and its results. It checks the arguments and calls `search`, or `tracking` if a last
  measurement is given.
- `search`: Lanczos runs from random starts, one after the other on the complement of what was found.
- `tracking`: one Lanczos run from the last measurement's eigenvectors.
- `bounds`: Ritz pairs, merged from run to run, the intervals that follow from them, and the rules by which these are
  narrow enough. Both kinds of run ask it when to end.
"""
