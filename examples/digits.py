"""A mixture of experts outside language models, on one device: handwritten digits, 8 × 8 pixels (scikit-learn's).

python examples/digits.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import moetrain

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
order = torch.randperm(len(x))
train, test = order[:1400], order[1400:]

layer = moetrain.MoE(dim=64, hidden=32, experts=8, top_k=2, init_std=0.1)  # as an MLP, on one device as it is built
model = nn.Sequential(layer, nn.LayerNorm(64), nn.Linear(64, 10))
handle = moetrain.expert_parallel(model, None, balance=moetrain.BalanceOptions(coefficient=0.01))  # one process alone
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for _epoch in range(30):
    for part in train[torch.randperm(len(train))].split(100):
        loss = nn.functional.cross_entropy(model(x[part]), y[part]) + handle.balance_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

with torch.no_grad():
    right = (model(x[test]).argmax(1) == y[test]).float().mean()
    routing, _ = layer.router(x[test])
print(f"accuracy on {len(test)} digits: {right:.3f}")
for digit in range(10):
    chosen = routing.expert_N[y[test][routing.token_N] == digit]
    print(f"digit {digit}: share of each expert", (torch.bincount(chosen, minlength=8) / len(chosen)).numpy().round(2))
