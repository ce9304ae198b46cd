"""log Z of a hidden Markov chain against its length: factor graphs and what else can sum it.

    python benchmarks/factor_graph.py --lengths 100 1000 10000 100000

Every contender gets the same chain and observations, in double precision, one after the other in
one process. `seconds` is processor time, the least of the repeats (wall time says more about the
neighbours on a machine that others use); `ratio` is over `FactorGraph`'s next calls. A contender
is left out at lengths at which it would take longer than `--limit`, and where it is not
installed (pgmpy). A last table has `FactorGraph` on other trees and with other questions.
"""

import argparse
import time
from collections.abc import Callable

import pyro.distributions as dist
import torch
from opt_einsum import get_symbol
from pyro.ops.contract import einsum

import pyro_ebm as ebm
from pyro_ebm import _elimination


class Chain:
    """A hidden Markov chain with its observations."""

    def __init__(self, length, states):
        self.length, self.states = length, states
        self.before = torch.randn(states).log_softmax(-1)
        self.move = torch.randn(states, states).log_softmax(-1)
        self.emit = torch.randn(states, 8).log_softmax(-1)
        self.seen = torch.randint(8, (length,))
        self.single = self.emit.T[self.seen]
        self.single[0] += (self.before[:, None] + self.move).logsumexp(0)

    def graph(self):
        factors = {(t,): -row for t, row in enumerate(self.single.unbind())}
        move = -self.move
        factors |= {(t, t + 1): move for t in range(self.length - 1)}
        return ebm.FactorGraph(factors, dict.fromkeys(range(self.length), self.states))


def first_call(chain):
    """FactorGraph from its tables to log Z, the search for an order included."""
    _elimination.find_order.cache_clear()
    _elimination.make_plan.cache_clear()
    return chain.graph().log_partition


def next_call(chain):
    """FactorGraph again."""
    g = chain.graph()
    g.log_partition()
    return g.log_partition


def discrete_hmm(chain):
    """pyro.distributions.DiscreteHMM, whose chain moves before the first observation."""
    hmm = dist.DiscreteHMM(chain.before, chain.move, dist.Categorical(logits=chain.emit))
    return lambda: hmm.log_prob(chain.seen)


def recursion(chain):
    """The forward recursion, a step at a time."""

    def total():
        forward = chain.single[0]
        for row in chain.single[1:].unbind():
            forward = (forward[:, None] + chain.move).logsumexp(0) + row
        return forward.logsumexp(0)

    return total


def pyro_einsum(chain):
    """pyro.ops.contract.einsum with its path by opt_einsum."""
    symbols = [get_symbol(t) for t in range(chain.length)]
    pairs = [a + b for a, b in zip(symbols, symbols[1:], strict=False)]
    tables = [*chain.single, *[chain.move] * len(pairs)]
    terms = ",".join([*symbols, *pairs])
    backend = "pyro.ops.einsum.torch_log"
    return lambda: einsum(f"{terms}->", *tables, backend=backend, modulo_total=True)[0]


def pgmpy_elimination(chain):
    """pgmpy's VariableElimination, which has no log Z: the marginal of the last variable."""
    from pgmpy.factors.discrete import DiscreteFactor
    from pgmpy.inference import VariableElimination
    from pgmpy.models import DiscreteMarkovNetwork

    names = [f"z{t}" for t in range(chain.length)]
    single, move, K = chain.single.exp().numpy(), chain.move.exp().numpy(), chain.states
    factors = [DiscreteFactor([n], [K], row) for n, row in zip(names, single, strict=True)]
    pairs = list(zip(names, names[1:], strict=False))
    factors += [DiscreteFactor(pair, [K, K], move) for pair in pairs]
    model = DiscreteMarkovNetwork(pairs)
    model.add_factors(*factors)

    def marginal():
        found = VariableElimination(model).query([names[-1]], show_progress=False)
        want = chain.graph().marginals()[chain.length - 1]
        values = torch.as_tensor(found.values).to(want)
        if not values.sum() > 0:
            raise ArithmeticError("underflows")
        torch.testing.assert_close(values / values.sum(), want)  # 1.1 does not normalise
        return want[0]

    return marginal


CONTENDERS: dict[str, Callable] = {
    "FactorGraph, first call": first_call,
    "FactorGraph, next calls": next_call,
    "pyro DiscreteHMM": discrete_hmm,
    "forward recursion": recursion,
    "pyro einsum": pyro_einsum,
    "pgmpy, one probability": pgmpy_elimination,
}


def processor_seconds(call, repeats):
    """Return the value of a call and the least processor time of it."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        value = call()
        best = min(best, time.process_time() - start)
    return value, best


def measure(name, chain, repeats):
    """Return log Z by a contender and its seconds."""
    if name == "FactorGraph, first call":
        return processor_seconds(lambda: CONTENDERS[name](chain)(), 1)
    return processor_seconds(CONTENDERS[name](chain), repeats)


def run(name, chain, repeats):
    """Return what a contender gives, or why it gives nothing."""
    try:
        return measure(name, chain, repeats)
    except (ArithmeticError, ImportError) as error:
        return str(error)


def compare(args):
    """Print a table of all contenders against the length."""
    print("| length | contender | value | seconds | ratio |\n|---|---|---|---|---|")
    spent: dict[str, tuple[int, float]] = {}
    failed: dict[str, str] = {}
    for length in args.lengths:
        chain = Chain(length, args.states)
        ours = measure("FactorGraph, next calls", chain, args.repeats)[1]
        for name in CONTENDERS:
            at, before = spent.get(name, (length, 0.0))
            if before * length / at > args.limit:
                failed[name] = f"over {args.limit:g} s"
            row = failed.get(name) or run(name, chain, args.repeats)
            if isinstance(row, str):
                failed[name] = row
                print(f"| {length} | {name} | {row} | | |", flush=True)
                continue
            value, seconds = row
            spent[name] = length, seconds
            ratio = seconds / ours
            print(f"| {length} | {name} | {value:.6f} | {seconds:.4f} | {ratio:.1f} |", flush=True)


def tree(length, kind):
    """Return the edges of a tree."""
    if kind == "random tree":
        return [(int(torch.randint(i, ())), i) for i in range(1, length)]
    return [(0 if kind == "star" else i - 1, i) for i in range(1, length)]


def questions(args):
    """Print the seconds of each question on trees of the greatest length."""
    print("\n| tree | question | seconds |\n|---|---|---|")
    n = max(args.lengths)
    for kind in ("chain", "star", "random tree"):
        table, edges = torch.randn(args.states, args.states), tree(n, kind)
        build = lambda table=table, edges=edges: ebm.FactorGraph(
            dict.fromkeys(edges, table), dict.fromkeys(range(n), args.states)
        )
        g, seconds = processor_seconds(build, 1)
        table.requires_grad_()
        asked = {
            "order": lambda g=g: g.cost,
            "plan": lambda g=g: g._plan(),
            "log_partition": g.log_partition,
            "its gradient": lambda g=g: g.log_partition().backward(),
            "minimum": g.minimum,
            "three minima": lambda g=g: g.minima(3),
            "marginals": g.marginals,
            "sample(1)": lambda g=g: g.sample(1),
        }
        print(f"| {kind} of {n} | build | {seconds:.2f} |")
        for name, call in asked.items():
            _, seconds = processor_seconds(call, 1)
            print(f"| {kind} of {n} | {name} | {seconds:.2f} |", flush=True)


def main(args):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(args.seed)
    compare(args)
    questions(args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--states", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds of a contender")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
