"""Boltzmann machines: energies of binary units."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_UNITS = 24
"""The most units of a layer whose states are summed one by one."""

CHUNK = 1 << 14
"""So many states of a layer are summed at once."""


class Ising(nn.Module):
    r"""The Ising model, or Boltzmann machine without hidden units.

    .. math:: E(x) = -\tfrac{1}{2} \sum_{ij} J_{ij} s_i s_j - \sum_i h_i s_i, \quad s = 2 x - 1

    Points are zeros and ones, as in Pyro's Bernoulli; the spins s are -1 and 1. Only the
    symmetric part of J counts, and not its diagonal.

    Args:
        num_spins: The number of spins.
        coupling: The first couplings J, ``(num_spins, num_spins)``; zeros if None.
        field: The first fields h, ``(num_spins,)``; zeros if None.

    Raises:
        ValueError: If there is no spin, or a shape does not fit.

    References:
        | Beitrag zur Theorie des Ferromagnetismus (Ising, 1925)
        | https://doi.org/10.1007/BF02980577

    Example:
        >>> energy = Ising(3, coupling=torch.ones(3, 3))
        >>> energy(torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]))
        tensor([-3.,  1.], grad_fn=<SubBackward0>)
    """

    def __init__(
        self, num_spins: int, coupling: Tensor | None = None, field: Tensor | None = None
    ) -> None:
        super().__init__()
        if num_spins < 1:
            raise ValueError(f"num_spins must be positive, got {num_spins}")
        self.coupling = nn.Parameter(_given("coupling", coupling, (num_spins, num_spins)))
        self.field = nn.Parameter(_given("field", field, (num_spins,)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the energies of points ``(*batch, num_spins)``."""
        s = 2.0 * x - 1.0
        return -0.5 * ((s @ _hollow(self.coupling)) * s).sum(-1) - s @ self.field


class Potts(nn.Module):
    r"""The Potts model: an Ising model whose sites have K states.

    .. math:: E(x) = -\tfrac{1}{2} \sum_{ij} J_{ij} \, x_i^\top x_j - \sum_i h_i^\top x_i

    Points are one-hot, of shape ``(num_sites, num_states)``: :math:`x_i^\top x_j` is one where
    two sites agree. Only the symmetric part of J counts, and not its diagonal.

    Args:
        num_sites: The number of sites.
        num_states: The number K of states of a site.
        coupling: The first couplings J, ``(num_sites, num_sites)``; zeros if None.
        field: The first fields h, ``(num_sites, num_states)``; zeros if None.

    Raises:
        ValueError: If there is no site or no state, or a shape does not fit.

    References:
        | Some Generalized Order-Disorder Transformations (Potts, 1952)
        | https://doi.org/10.1017/S0305004100027419

    Example:
        >>> energy = Potts(2, 3, coupling=torch.ones(2, 2))
        >>> energy(torch.eye(3)[torch.tensor([1, 1])])
        tensor(-1., grad_fn=<SubBackward0>)
    """

    def __init__(
        self,
        num_sites: int,
        num_states: int,
        coupling: Tensor | None = None,
        field: Tensor | None = None,
    ) -> None:
        super().__init__()
        if min(num_sites, num_states) < 1:
            raise ValueError(
                f"num_sites and num_states must be positive, got {num_sites}, {num_states}"
            )
        self.coupling = nn.Parameter(_given("coupling", coupling, (num_sites, num_sites)))
        self.field = nn.Parameter(_given("field", field, (num_sites, num_states)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the energies of points ``(*batch, num_sites, num_states)``."""
        pairs = ((_hollow(self.coupling) @ x) * x).sum((-2, -1))
        return -0.5 * pairs - (self.field * x).sum((-2, -1))


class RBM(nn.Module):
    r"""The restricted Boltzmann machine: an energy of visible and hidden units.

    .. math::
        E(v, h) = -b^\top v - c^\top h - v^\top W h, \quad
        F(v) = -b^\top v - \sum_j \log(1 + e^{c_j + (v^\top W)_j})

    Called with visible units alone it is the free energy F at :math:`\beta = 1`. At other
    temperatures take ``ebm.FreeEnergy(rbm, ebm.Flat((num_hidden,), constraints.boolean), beta)``,
    since :math:`F_\beta \ne \beta F_1`.

    Args:
        num_visible: The number of visible units.
        num_hidden: The number of hidden units.
        scale: The standard deviation of the first weights.

    Raises:
        ValueError: If there are no units.

    References:
        | Information Processing in Dynamical Systems: Foundations of Harmony Theory (Smolensky,
          1986)
        | https://stanford.edu/~jlmcc/papers/PDP/Volume%201/Chap6_PDP86.pdf

    Example:
        >>> rbm, v = RBM(6, 4), torch.zeros(5, 6)
        >>> rbm(v).shape, rbm(v, torch.zeros(5, 4)).shape
        (torch.Size([5]), torch.Size([5]))
    """

    def __init__(self, num_visible: int, num_hidden: int, *, scale: float = 0.01) -> None:
        super().__init__()
        if min(num_visible, num_hidden) < 1:
            raise ValueError(
                f"num_visible and num_hidden must be positive, got {num_visible}, {num_hidden}"
            )
        self.weight = nn.Parameter(scale * torch.randn(num_visible, num_hidden))
        self.visible_bias = nn.Parameter(torch.zeros(num_visible))
        self.hidden_bias = nn.Parameter(torch.zeros(num_hidden))

    def forward(self, v: Tensor, h: Tensor | None = None) -> Tensor:
        """Return the energies of ``(*batch, num_visible)``, or with ``(*batch, num_hidden)``."""
        inputs = self.hidden_logits(v)
        hidden = nn.functional.softplus(inputs) if h is None else inputs * h
        return -(v @ self.visible_bias) - hidden.sum(-1)

    def hidden_logits(self, v: Tensor) -> Tensor:
        """Return the log-odds of hidden units given the visible ones."""
        return v @ self.weight + self.hidden_bias

    def visible_logits(self, h: Tensor) -> Tensor:
        """Return the log-odds of visible units given the hidden ones."""
        return h @ self.weight.T + self.visible_bias

    def sample_hidden(self, v: Tensor) -> Tensor:
        """Draw hidden units given the visible ones."""
        return _bernoulli(self.hidden_logits(v))

    def sample_visible(self, h: Tensor) -> Tensor:
        """Draw visible units given the hidden ones."""
        return _bernoulli(self.visible_logits(h))

    def log_partition(self, beta: float | Tensor = 1.0) -> Tensor:
        r"""Return the exact log Z of the joint energy at an inverse temperature.

        .. math:: \log Z_\beta = \log \sum_h e^{\beta c^\top h}
            \prod_i \bigl(1 + e^{\beta (b_i + (W h)_i)}\bigr)

        The states of the smaller layer are summed one by one, those of the other in closed form;
        gradients flow to the parameters and to ``beta``. At :math:`\beta = 1` it is also the
        log Z of the free energy.

        Args:
            beta: The inverse temperature: a number, or a tensor of one element.

        Returns:
            A scalar.

        Raises:
            ValueError: If both layers have more than 24 units.

        Example:
            >>> RBM(6, 4, scale=0.0).log_partition() / torch.tensor(2.0).log()
            tensor(10., grad_fn=<DivBackward0>)
        """
        layers = self.visible_bias, self.hidden_bias
        swap = len(layers[0]) > len(layers[1])
        own, other = reversed(layers) if swap else layers
        weight = self.weight.T if swap else self.weight
        if len(own) > MAX_UNITS:
            raise ValueError(
                f"num_visible or num_hidden must be at most {MAX_UNITS} to sum over all states "
                f"of a layer, got {self.weight.shape[0]}, {self.weight.shape[1]}"
            )
        place = torch.arange(len(own), device=own.device)

        def part(state: Tensor) -> Tensor:
            x = (state.unsqueeze(-1) >> place & 1).to(own)
            logits = beta * (x @ weight + other)
            return (beta * (x @ own) + nn.functional.softplus(logits).sum(-1)).logsumexp(0)

        chunks = torch.arange(1 << len(own), device=own.device).split(CHUNK)
        # A chunk is computed again for its gradient: else 2^20 states need gigabytes.
        return torch.stack([checkpoint(part, c, use_reentrant=False) for c in chunks]).logsumexp(0)


def _bernoulli(logits: Tensor) -> Tensor:
    prob = logits.detach().sigmoid()
    return torch.rand_like(prob).lt_(prob)  # in place: no comparison and cast


def _hollow(coupling: Tensor) -> Tensor:
    """Leave out the diagonal."""
    return coupling - torch.diag(coupling.diagonal())


def _given(name: str, value: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if value is None:
        return torch.zeros(shape)
    if value.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(value.shape)}")
    return value.detach().clone()
