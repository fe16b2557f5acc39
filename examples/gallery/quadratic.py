"""
What is the Hessian of a quadratic form?
========================================

The Hessian of f(x) = x'Ax is A + A'. The sum is symmetric however far A is from
symmetric: second derivatives do not depend on the order in which they are taken. For a
symmetric A the Hessian is 2A.
"""

import matplotlib.pyplot as plt
import torch
from torch.func import hessian as dense_hessian

from newtonopt import evaluate, hessian

torch.manual_seed(0)
n = 6
A = torch.randn(n, n, dtype=torch.float64)
x = torch.randn(n, dtype=torch.float64, requires_grad=True)


def f(x):
    return x @ A @ x


# %%
# A Hessian known by its products
# -------------------------------
#
# newtonopt does not form the matrix: ``H @ v`` multiplies it by a vector, for the cost of
# about two gradients. The products with the unit vectors are its columns.
# ``torch.func.hessian`` forms the matrix at once, which takes n times the memory of the
# parameters.

H = hessian(evaluate(lambda: f(x), [x]))
products = torch.stack([H @ unit for unit in torch.eye(n, dtype=torch.float64)])
dense = dense_hessian(f)(x.detach())
by_hand = A + A.T


def gap(one, other):
    return float((one - other).abs().max())


print(f"products against A + A':        {gap(products, by_hand):.1e}")
print(f"torch.func against A + A':      {gap(dense, by_hand):.1e}")
print(f"products against the transpose: {gap(products, products.T):.1e}")
print(f"A against its transpose:        {gap(A, A.T):.2f}")

# %%
# A is not symmetric, and the Hessian is
# --------------------------------------

figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.7), layout="constrained")
for axes, matrix, title in zip(
    panels, (A, products), ("A", "the Hessian of x'Ax"), strict=True
):
    drawn = axes.imshow(matrix.numpy(), cmap="RdBu", vmin=-6, vmax=6)
    for row in range(n):
        for column in range(n):
            entry = float(matrix[row, column])
            text = f"{entry:.1f}".replace("-0.0", "0.0")
            style = {"color": "w" if abs(entry) > 4 else "k", "fontsize": 8}
            axes.text(column, row, text, ha="center", va="center", **style)
    axes.set(title=title, xticks=[], yticks=[])
figure.colorbar(drawn, ax=panels, shrink=0.85)
plt.show()
