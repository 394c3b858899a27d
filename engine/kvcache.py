"""The key-value cache of sampling, and the CUDA graph that replays a step."""
import torch

from engine import devices
from engine.attention import attention


class KVCache:
    """Keys and values of every layer, (n_layer, B, n_head, max_len, head_dim), with rows sorted by length.

    length (B,) is how many positions each row holds. A step reads only the columns in use, rounded up to
    a multiple of BLOCK. On a CPU, each of four slices of the rows reads as many as it needs. On CUDA, all
    rows read the same number, because each number of columns needs a CUDA graph of its own; on Apple's mps
    likewise, because each shape is compiled.
    """
    SLICES = {"cuda": 1, "mps": 1, "cpu": 4}
    BLOCK = {"cuda": 128, "mps": 128, "cpu": 1}

    def __init__(self, config, lengths, new_tokens, like):
        """lengths: of the prompts, sorted. like: a tensor that has the cache's device and dtype."""
        device = like.device
        device_type = devices.device_type(device)
        self.block = self.BLOCK[device_type]
        self.slices = slices(len(lengths), self.SLICES[device_type])
        self.longest = [lengths[rows][-1] for rows in self.slices]  # length of each slice's longest prompt
        # On CUDA a multiple of 16, because attention would copy a mask with rows of any other length.
        max_len = round_up(lengths[-1] + new_tokens, min(self.block, 16))
        shape = (config.n_layer, len(lengths), config.n_head, max_len, config.n_embd // config.n_head)
        self.k = like.new_zeros(shape)  # zeros: attention reads masked columns too, and 0 · NaN is NaN
        self.v = like.new_zeros(shape)
        self.rows = torch.arange(len(lengths), device=device)
        self.columns = torch.arange(max_len, device=device)
        self.length = torch.tensor(lengths, device=device)

    def prefill(self, rows, source, layer, q, k, v):
        """Attention of whole prompts, right-padded: writes their keys and values into `rows` of the cache.

        source: for each of these rows the index of its prompt.
        """
        self.k[layer, rows, :, :k.size(2)] = k[source]
        self.v[layer, rows, :, :v.size(2)] = v[source]
        return attention(q, k, v)  # causal: no token sees the padding to its right

    def columns_in_use(self, t):
        """How many columns each slice of the rows reads in the t-th step after the prompts."""
        return [min(round_up(longest + t, self.block), len(self.columns)) for longest in self.longest]

    def mask(self):
        """(B, 1, 1, max_len), to be added to q kᵀ/√d: 0 where a row may look, −∞ elsewhere."""
        allowed = self.columns <= self.length[:, None]  # "<=": this step writes column `length`
        return self.k.new_zeros(1).where(allowed, -torch.inf)[:, None, None]

    def append(self, n_columns, mask, layer, q, k, v):
        """Attention of one new token per row: writes its key and value, then looks at the whole row."""
        self.k[layer, self.rows, :, self.length] = k[:, :, 0]
        self.v[layer, self.rows, :, self.length] = v[:, :, 0]
        outputs = []
        for rows, n in zip(self.slices, n_columns):
            keys = self.k[layer, rows, :, :n]
            values = self.v[layer, rows, :, :n]
            outputs.append(attention(q[rows], keys, values, mask[rows, ..., :n]))
        return torch.cat(outputs)


class CUDAGraph:
    """Calls step(key), as a CUDA graph from the second call with the same key on.

    The first call with a new key runs the step, the second records it as a graph, and that call and all
    later ones replay the graph, which saves launching each kernel. The step must work in place.
    """

    def __init__(self, step):
        self.step = step
        self.key = None

    def __call__(self, key):
        if key != self.key:
            self.key = key
            self.graph = None
            self.step(key)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records the step without running it
                self.step(key)
        self.graph.replay()


def slices(n, pieces):
    """Cuts 0 … n-1 into at most `pieces` slices of about the same size."""
    size = -(-n // pieces)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def round_up(n, multiple):
    return -(-n // multiple) * multiple
