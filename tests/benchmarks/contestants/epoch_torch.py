"""The recipe's epochs by hand, without distribution: a DataLoader, the loop, an evaluation; prints seconds of each.

`epoch_torch.py EPOCHS GLOBAL_BATCH`. Started as N processes, each trains by itself on its part of the data.
"""

import sys
import time

import torch
import torch_common as common

from tests.benchmarks.turns import place, threads
from toolkit import datasets

torch.set_num_threads(threads())
rank, size = place()
epochs, batch = int(sys.argv[1]), int(sys.argv[2]) // size
train, test = datasets.digits(None)
x, y = (torch.from_numpy(array[rank::size]) for array in (train.x, train.y))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.unsqueeze(1), y), batch, shuffle=True)
test_x, test_y = (torch.from_numpy(array[rank::size]) for array in (test.x, test.y))
model = common.build()
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
for _ in range(epochs):
    began = time.perf_counter()
    model.train()
    total = 0.0
    for images, labels in loader:
        optimizer.zero_grad()
        loss = common.loss_of(model(images), labels)
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_x.unsqueeze(1)).argmax(1) == test_y).float().mean().item()
    print(f"seconds {time.perf_counter() - began} loss {total / len(loader)} accuracy {accuracy}", flush=True)
