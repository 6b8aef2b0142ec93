"""A few lines of text from the model. All ranks work on the same prompts, in lockstep."""

import torch
from torch import nn

from moetrain.comm import broadcast
from moetrain.config import Config, Generate
from moetrain.data.loader import Corpus
from moetrain.evaluate import held_out_windows
from moetrain.mesh import Mesh

PROMPT_TOKENS = 16


@torch.no_grad()
def generate(
    model: nn.Module, corpus: Corpus, prompts: list[list[int]], options: Generate, seq_len: int, mesh: Mesh
) -> list[str]:
    """Continue each prompt (token ids) by `options.tokens` tokens. Rank 0 draws; everybody follows."""
    device = mesh.device
    generator = torch.Generator().manual_seed(options.seed)
    texts = []
    for prompt in prompts:
        tokens = torch.tensor([prompt or [corpus.end_of_text]], device=device)
        for _ in range(options.tokens):
            logits, _ = model(tokens[:, -seq_len:])
            last = logits[0, -1].float().cpu()
            if options.temperature:
                drawn = torch.multinomial((last / options.temperature).softmax(-1), 1, generator=generator)
            else:
                drawn = last.argmax(keepdim=True)
            tokens = torch.cat([tokens, broadcast(drawn.to(device))[None]], dim=1)
            if int(tokens[0, -1]) == corpus.end_of_text:
                break
        texts.append(corpus.tokenizer.decode(tokens[0, len(prompt) :].tolist()))
    return texts


def prompts_of(corpus: Corpus, config: Config) -> list[tuple[str, list[int]]]:
    """(title, tokens): the user's prompt, or the first held-out tokens of every domain."""
    if config.generate.prompt is not None:
        return [("prompt", corpus.tokenizer.encode(config.generate.prompt, add_special_tokens=False).ids)]
    out = []
    for number, name in enumerate(corpus.domains):
        windows = held_out_windows(corpus, config, number).tokens
        if len(windows):
            out.append((name, windows[0, :PROMPT_TOKENS].tolist()))
    return out
