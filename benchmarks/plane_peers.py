"""The losses of torchebm and ebmkit with their defaults: ``PEERS[name](model)`` is as ours."""

from benchmarks.contender import need


def torchebm(loss, sampler=None, **options):
    """Prepare a loss of torchebm, with its sampler where it takes one."""

    def make(model):
        core, torch_losses = need("torchebm.core"), need("torchebm.losses")

        class Model(core.BaseModel):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, x):
                return self.inner(x)

        theirs = Model()
        if sampler is not None:
            options["sampler"] = getattr(need("torchebm.samplers"), sampler)(theirs)
        criterion = getattr(torch_losses, loss)(theirs, **options)

        def value(x):
            out = criterion(x)
            return out[0] if isinstance(out, tuple) else out

        return value, []

    return make


def ebmkit(loss, sampler=None, buffer=False, **options):
    """Prepare a loss of ebmkit, with its sampler and its buffer where it takes them."""

    def make(model):
        ebm_losses = need("ebm.losses")
        if sampler is not None:
            options["sampler"] = getattr(need("ebm.samplers"), sampler)()
        if buffer:
            options["buffer"] = need("ebm.buffer").ReplayBuffer(10_000, (2,))
        criterion = getattr(ebm_losses, loss)(**options)
        return lambda x: criterion(model, x).loss, list(criterion.parameters())

    return make


PEERS = {
    "torchebm CD": torchebm("ContrastiveDivergence", "LangevinDynamics"),
    "torchebm PCD": torchebm("PersistentContrastiveDivergence", "LangevinDynamics"),
    "torchebm CD, HMC": torchebm("ContrastiveDivergence", "HamiltonianMonteCarlo"),
    "torchebm score matching": torchebm("ScoreMatching"),
    "torchebm sliced score matching": torchebm("SlicedScoreMatching"),
    "torchebm denoising score matching": torchebm("DenoisingScoreMatching"),
    "ebmkit CD": ebmkit("ContrastiveDivergence", "LangevinDynamics"),
    "ebmkit PCD": ebmkit("ContrastiveDivergence", "LangevinDynamics", buffer=True),
    "ebmkit PCD, HMC": ebmkit("ContrastiveDivergence", "HMC", buffer=True),
    "ebmkit score matching": ebmkit("ExactScoreMatching"),
    "ebmkit sliced score matching": ebmkit("SlicedScoreMatching"),
    "ebmkit denoising score matching": ebmkit("DenoisingScoreMatching"),
    "ebmkit noise contrast": ebmkit("NoiseContrastiveEstimation"),
    "ebmkit energy discrepancy": ebmkit("EnergyDiscrepancy"),
}
