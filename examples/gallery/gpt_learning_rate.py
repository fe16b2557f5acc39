"""
Is my transformer's learning rate too high?
===========================================

Compare the largest eigenvalue of the Hessian, as the optimizer sees it, with the
optimizer's stability threshold. Here a character GPT learns the Zen of Python by Adam
three times: at a low learning rate with warm-up, at a high one with warm-up, and at the
high one at once. The last run fails, and the ratio of the two numbers says so from the
first step on.
"""

import codecs
import contextlib
import io
import statistics
import textwrap

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from newtonopt.curvature import measure, plot_history, step_margin

torch.set_num_threads(1)  # the matrices are small

with contextlib.redirect_stdout(io.StringIO()):
    import this
text = codecs.decode(this.s, "rot13")
letters = sorted(set(text))
count, length, width = 13, 32, 24
codes = torch.tensor([letters.index(letter) for letter in text])
inputs = codes[: count * length].view(count, length)
targets = codes[1 : count * length + 1].view(count, length)
print(f"{count} pieces of {length} characters, {len(letters)} different")

# %%
# The model
# ---------
#
# A GPT with two blocks and a width of 24. Attention is torch's own kernel, which
# newtonopt differentiates twice.


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width))

    def forward(self, x):
        parts = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(len(letters), width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width))
        self.body = nn.Sequential(Block(), Block(), nn.LayerNorm(width))
        self.head = nn.Linear(width, len(letters))

    def forward(self, letters):
        return self.head(self.body(self.embed(letters) + self.places))


# %%
# Train and measure
# -----------------
#
# ``step_margin`` takes every tenth step, and tells how near it came to raising the loss.
# ``measure`` then finds the largest eigenvalues: of the Hessian, and of the
# preconditioned matrix, whose threshold for Adam is 38 / lr. Both leave training as it
# is, to the bit. With ``last=`` a measurement follows the one before for fewer products;
# here the weights move too far for that between two of them. Under Lightning
# ``CurvatureMonitor`` and ``StepMarginMonitor`` log the same values.


little = {"top": 1, "bottom": 0, "sharpness": None, "gradient": False, "max_products": 24}


def train(lr, warmup, steps=101, every=10):
    """Return the losses, the step margins and the measurements by their steps."""
    torch.manual_seed(1)
    model = GPT().double()
    adam = torch.optim.Adam(model.parameters())

    def closure():
        adam.zero_grad()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        return loss

    losses, margins, found = [], {}, {}
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / max(1, warmup))
        if step % every:
            losses.append(adam.step(closure).item())
            continue
        margins[step] = step_margin(adam, closure)
        losses.append(margins[step].loss)
        found[step] = measure(closure, model.parameters(), adam, **little)
    return losses, margins, found


runs = {
    "0.005 with warm-up": train(0.005, warmup=40),
    "0.15 with warm-up": train(0.15, warmup=40),
    "0.15 at once": train(0.15, warmup=0),
}
colours = dict(zip(runs, ("#0072B2", "#D55E00", "0.3"), strict=True))
for name, (losses, _, found) in runs.items():
    ratios = [measured["curvature/stability_ratio"] for measured in found.values()]
    print(f"{name:<18}: loss {losses[-1]:.2g}, first ratio {ratios[0]:.3g},", end=" ")
    print(f"median {statistics.median(ratios):.2g}")

# %%
# Loss and stability ratio
# ------------------------
#
# At the low rate the ratio grows to about one and hovers there: the edge of stability,
# grey below. The edge is a normal place to train at, and the loss falls. With
# cross-entropy the ratio falls in the end, when there is nothing left to learn.
#
# At the high rate steps are beyond the edge. With warm-up they are so by a small factor,
# and training goes fast, though not evenly. Without warm-up the first step is hundreds of
# times longer than the curvature allows. The step throws the weights to places where the
# loss curves so much that training hardly gets on.

figure, (above, below) = plt.subplots(
    2, 1, figsize=(7.2, 6.2), sharex=True, layout="constrained"
)
for name, (losses, _, found) in runs.items():
    above.semilogy(losses, color=colours[name], label=name)
    ratios = [measured["curvature/stability_ratio"] for measured in found.values()]
    below.semilogy(list(found), ratios, ".-", color=colours[name])
below.axhspan(0.9, 1.25, color="0.88", label="edge of stability")
above.set(ylabel="loss")
below.set(xlabel="step", ylabel="stability ratio")
above.legend(frameon=False)
below.legend(frameon=False)
plt.show()

# %%
# The verdicts on the first step name the remedy: a lower rate, or warming up to it.

for name, (_, _, found) in runs.items():
    verdict, reason, *_ = found[0].in_words().splitlines()
    print(textwrap.fill(f"{name}. {verdict} {reason}", 84), end="\n\n")

# %%
# The run at the low rate
# -----------------------
#
# ``plot_history`` draws all that was measured. Filled markers are certified values, whose
# error bounds hold. The threshold (dashed) falls while the learning rate is warmed up,
# and where the eigenvalue is above it the picture is shaded.

plot_history(runs["0.005 with warm-up"][2])
plt.show()

# %%
# What the step margin says
# -------------------------
#
# The step margin costs two forward passes and a backward pass. Below one the step lowered
# the loss of its own batch; from one on it did not. At the low rate the margin is near
# zero until training comes to the edge of stability. At the high rate it is around one in
# both runs, the one that learns and the one that fails. The margin says that steps are
# about as long as the loss allows, and not what will come of it. A gap is a step that did
# not go downhill.

figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
for name, (_, margins, _) in runs.items():
    values = [found.margin for found in margins.values()]
    axes.plot(list(margins), values, ".-", color=colours[name], label=name)
axes.axhline(1, color="0.6", linestyle="--", zorder=0)
axes.set(xlabel="step", ylabel="step margin")
axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()
