"""RBMs as other libraries learn them: ``PEERS[name](x, num_hidden, lr)`` gives a loop.

A loop takes a number of steps of one sweep and 256 rows, and returns the RBM as ours. Each is the
library's own, with its own gradient and optimiser; torchebm gets the RBM's energy and block
sampler, since it has neither.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.contender import need
from pyro_ebm.zoo import RBM

BATCH = 256
Loop = Callable[[int], RBM]


def ours(weight, visible, hidden) -> RBM:
    """Return our RBM of these weights ``(visible, hidden)`` and biases."""
    rbm = RBM(*weight.shape)
    names = ("weight", "visible_bias", "hidden_bias")
    values = map(torch.as_tensor, (weight, visible, hidden))
    rbm.load_state_dict(dict(zip(names, values, strict=True)))
    return rbm


def sklearn(x: Tensor, num_hidden: int, lr: float, batch: int = BATCH) -> Loop:
    """PCD of scikit-learn's BernoulliRBM."""
    cls = need("sklearn.neural_network").BernoulliRBM

    def run(num_steps):
        epochs = round(num_steps * batch / len(x))
        seed = int(torch.randint(1 << 30, ()))
        model = cls(
            num_hidden, learning_rate=lr, batch_size=batch, n_iter=epochs, random_state=seed
        )
        model.fit(x.numpy())
        return ours(model.components_.T, model.intercept_visible_, model.intercept_hidden_)

    return run


def rbms(x: Tensor, num_hidden: int, lr: float, kind: str = "pcd") -> Loop:
    """The training loop of rbms: centred gradients, SGD, a file that keeps the rates."""
    train = need("rbms.training.pcd").train
    plain = need("rbms.parser").default_args
    load = need("rbms.io").load_params
    models = need("rbms.map_model").map_model
    dataset = need("rbms.dataset.dataset_class").RBMDataset
    n = len(x)
    rows = [x.numpy(), np.zeros(n), np.ones(n), np.arange(n)]
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    data = dataset(*rows, "digits", True, device="cpu", dtype=torch.float32)

    def run(num_steps):
        with tempfile.TemporaryDirectory() as folder:
            args = {**plain, **options, "filename": str(Path(folder) / "rbm.h5"), "log": False}
            args |= {"num_hiddens": num_hidden, "batch_size": BATCH, "num_chains": BATCH}
            args |= {"gibbs_steps": 1, "learning_rate": lr, "num_updates": num_steps}
            args |= {"training_type": kind, "train_size": 1.0, "test_size": None}
            args |= {"seed": int(torch.randint(1 << 30, ()))}
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                train(data, data, "BBRBM", args, torch.float32, np.array([num_steps]))
            found = load(args["filename"], num_steps, **options, map_model=models)
        return ours(found.weight_matrix, found.vbias, found.hbias)

    return run


def rbms_bare(x: Tensor, num_hidden: int, lr: float) -> Loop:
    """Only the gradient of rbms and its optimiser, without its files."""
    cls = need("rbms.bernoulli_bernoulli.classes").BBRBM
    gradient = need("rbms.training.pcd").fit_batch_pcd
    weight, biases = 1e-4 * torch.randn(x.shape[1], num_hidden), torch.zeros(num_hidden)
    model, weights = (
        cls(weight, x.mean(0).clamp(1e-4, 1 - 1e-4).logit(), biases),
        x.new_ones(len(x)),
    )
    model.init_grad()
    optim = torch.optim.SGD(model.parameters(), lr=lr, maximize=True)
    chains = model.init_chains(BATCH)

    @torch.no_grad()
    def run(num_steps):
        nonlocal chains
        for _ in range(num_steps):
            rows = torch.randperm(len(x))[:BATCH]
            optim.zero_grad(set_to_none=False)
            chains, _ = gradient((x[rows], weights[rows]), chains, model, 1, 1.0)
            optim.step()
        return ours(model.weight_matrix, model.vbias, model.hbias)

    return run


def torchebm(x: Tensor, num_hidden: int, lr: float, kind: str = "pcd") -> Loop:
    """torchebm's loss in the loop of its manual (0.8.9's trainer cannot be made), with Adam."""
    core, losses = need("torchebm.core"), need("torchebm.losses")

    class Model(core.BaseModel):
        def __init__(self):
            super().__init__()
            self.rbm = RBM(x.shape[1], num_hidden)

        def forward(self, v):
            return self.rbm(v)

    class Sampler(core.BaseSampler):
        @torch.no_grad()
        def sample(self, x=None, n_steps=1, **options):
            for _ in range(n_steps):
                h = torch.bernoulli(self.model.rbm.hidden_logits(x).sigmoid_())
                x = torch.bernoulli(self.model.rbm.visible_logits(h).sigmoid_())
            return x

    model = Model()
    options = {"k_steps": 1, "persistent": kind == "pcd", "buffer_size": BATCH}
    loss = losses.ContrastiveDivergence(model, Sampler(model), **options)
    optim = torch.optim.Adam(model.parameters(), lr)

    def run(num_steps):
        for _ in range(num_steps):
            optim.zero_grad()
            loss(x[torch.randint(len(x), (BATCH,))])[0].backward()
            optim.step()
        return model.rbm

    return run


def ebmkit(x: Tensor, num_hidden: int, lr: float) -> Loop:
    """ebmkit's trainer: PCD with its RBM, Gibbs sampler and buffer; Adam."""
    sampler = need("ebm.samplers.gibbs").GibbsSampler(1)
    buffer = need("ebm.buffer").ReplayBuffer(
        4 * BATCH, (x.shape[1],), 0.0, lambda shape: torch.bernoulli(torch.full(shape, 0.5))
    )
    model = need("ebm.nets").RBM(x.shape[1], num_hidden)
    loss = need("ebm.losses").ContrastiveDivergence(sampler, buffer)
    trainer = need("ebm.training").Trainer(model, loss, lr=lr)

    def run(num_steps):
        trainer.fit(x, num_steps, BATCH, verbose=False)
        return ours(model.W.detach().T, model.b.detach(), model.c.detach())

    return run


def cd(peer):
    """Return the same peer with chains that start at the batch."""
    return lambda x, num_hidden, lr: peer(x, num_hidden, lr, kind="cd")


ADAM, SGD = (0.001, 0.01, 0.03), (0.01, 0.1, 0.5)
PEERS: dict[str, tuple[Callable[..., Loop], tuple[float, ...]]] = {
    "rbms PCD-1": (rbms, SGD),
    "rbms CD-1": (cd(rbms), SGD),
    "torchebm PCD-1": (torchebm, ADAM),
    "torchebm CD-1": (cd(torchebm), ADAM),
    "ebmkit PCD-1": (ebmkit, ADAM),
}
TIMED: dict[str, Callable[..., Loop]] = {
    "rbms, its loop": rbms,
    "rbms, its gradient alone": rbms_bare,
    "torchebm, its loss": torchebm,
    "ebmkit, its trainer": ebmkit,
    "scikit-learn": sklearn,
}
