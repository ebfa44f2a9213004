"""Chat templates of the kinds that are in use, and a small tokenizer that knows their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from recipes.sft.chat_encoder import ChatEncoder
from recipes.sft.chat_template import TemplateSource
from recipes.stages.receipts import hash_file
from recipes.stages.tokenizer import PreparedTokenizer

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|head|>",
    "<|tail|>",
    "<|eot|>",
    "[INST]",
    "[/INST]",
    "<s>",
    "</s>",
)

#: Headers and trimmed contents, in the manner of Llama 3.
HEADERS = """{{- '<s>' }}
{%- for message in messages %}
    {{- '<|head|>' + message['role'] + '<|tail|>\n\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"""

#: No header and no generation prompt, alternating roles, in the manner of Mistral.
BRACKETS = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}{{ ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""

#: Thoughts in front of the last answer only, so that earlier text changes: like Qwen 3.
THOUGHTS = """{% for message in messages %}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.last %}
<think>

</think>

{% endif %}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

#: A generation prompt that no finished conversation has in it: like the distilled DeepSeek R1.
THINK_FIRST = """{%- for message in messages %}
    {{- '<|head|>' + message.role + '<|tail|>' + message.content }}
    {{- '<|eot|>' if message.role == 'assistant' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|tail|><think>\n' }}{% endif %}"""

#: The same, with contents trimmed.
THINK_FIRST_TRIMMED = THINK_FIRST.replace("message.content", "message.content | trim")

#: A template that says itself what is learnt.
MARKED = """{% for message in messages %}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}
{% generation %}
{{ message.content }}<|im_end|>
{%- endgeneration %}

{% else %}
{{ message.content }}<|im_end|>
{% endif %}
{% endfor %}"""


def small_tokenizer(path: Path) -> PreparedTokenizer:
    """Train a byte-level BPE that merges spaces and line ends, and lay it into a file.

    It trims the spaces off its offsets, as those of GPT-2 and Llama 3 do.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = "assistant\n\n\n\n user\n\n  an answer is an answer \n\n\n and im_end|> im_start|>\n "
    tokenizer.train_from_iterator([text * 20], trainer)
    tokenizer.save(str(path))
    return prepared(path)


def prepared(path: Path) -> PreparedTokenizer:
    """Describe a tokenizer file as the recipe does."""
    vocabulary = Tokenizer.from_file(str(path)).get_vocab()
    return PreparedTokenizer(path, hash_file(path).xxh64, max(vocabulary.values()) + 1, 0)


def encoder(tokenizer: PreparedTokenizer, text: str, **more: str) -> ChatEncoder:
    """Return an encoder for a template."""
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatEncoder(tokenizer, TemplateSource(text, variables=variables, **more))


def chat(*contents: str, system: str | None = None) -> tuple[dict[str, str], ...]:
    """Return messages of user and assistant in turn."""
    roles = ("user", "assistant")
    first = () if system is None else ({"role": "system", "content": system},)
    return first + tuple(
        {"role": roles[k % 2], "content": content} for k, content in enumerate(contents)
    )


def learnt(tokenizer: PreparedTokenizer, ids: Sequence[int], mask: Sequence[int]) -> str:
    """Return what the tokens say that are learnt."""
    chosen = [token for token, one in zip(ids, mask, strict=True) if one]
    text: str = Tokenizer.from_file(str(tokenizer.path)).decode(chosen, skip_special_tokens=False)
    return text
