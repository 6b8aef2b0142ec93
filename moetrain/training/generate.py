"""A few lines of text from the model. All ranks work on the same prompts, in lockstep."""

import torch
from torch import nn

from moetrain.config import Config, Generate
from moetrain.data.chat_template import write_prompt
from moetrain.data.held_out import held_out_windows
from moetrain.data.loader import Corpus
from moetrain.distributed.comm import broadcast
from moetrain.distributed.mesh import Mesh

PROMPT_TOKENS = 16


@torch.no_grad()
def generate(
    model: nn.Module, corpus: Corpus, prompts: list[list[int]], options: Generate, seq_len: int, mesh: Mesh
) -> list[str]:
    """Continue the prompts (token ids, equally many) by `options.tokens` tokens. Rank 0 draws; everybody follows."""
    if not prompts:
        return []
    end, begin = corpus.end_of_text, len(prompts[0])
    tokens = torch.tensor([prompt or [end] for prompt in prompts], device=mesh.device)  # [B, L]
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.tokens):
        logits, _ = model(tokens[:, -seq_len:])
        last = logits[:, -1].float().cpu()
        if options.temperature:
            drawn = torch.multinomial((last / options.temperature).softmax(-1), 1, generator=generator)
        else:
            drawn = last.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, broadcast(drawn.to(mesh.device))], dim=1)
        if (tokens[:, begin or 1 :] == end).any(1).all():
            break
    written = (row[begin or 1 :] for row in tokens.tolist())
    return [corpus.tokenizer.decode(row[: row.index(end)] if end in row else row) for row in written]


def prompts_of(corpus: Corpus, config: Config) -> list[tuple[str, list[int]]]:
    """(title, tokens): the user's prompt, or the first held-out tokens of every domain; of conversations as long as all
    of them are asked, up to the answer."""
    if corpus.is_chat:
        return _prompts_of_chat(corpus, config)
    if config.generate.prompt is not None:
        return [("prompt", corpus.tokenizer.encode(config.generate.prompt, add_special_tokens=False).ids)]
    out = []
    for number, name in enumerate(corpus.domains):
        windows = held_out_windows(corpus, config, number).tokens
        if len(windows):
            out.append((name, windows[0, :PROMPT_TOKENS].tolist()))
    return out


def _prompts_of_chat(corpus: Corpus, config: Config) -> list[tuple[str, list[int]]]:
    """(title, tokens): the user's message in the chat template, or a held-out conversation of every domain up to the
    first answer; where these differ in length, their ends."""
    if config.generate.prompt is not None:
        return [("prompt", write_prompt(corpus.folder, corpus.tokenizer, config.generate.prompt))]
    out = []
    for number, name in enumerate(corpus.domains):
        found = held_out_windows(corpus, config, number)
        if len(found.tokens) and found.target is not None:
            out.append((name, found.tokens[0, : max(1, int(found.target[0].argmax()))].tolist()))
    shortest = min((len(prompt) for _, prompt in out), default=0)
    return [(name, prompt[-shortest:]) for name, prompt in out]
