"""Chat templates: each is made to write the system prompt and to ask for no thoughts, in the template itself.

So TRL, vLLM, evaluation, infer.py and whoever loads the saved tokenizer get one prompt from the same messages.
"""

from tokenizers import processors

from support.errors import UserError

# Qwen3's and others' would leave room for thoughts, which belong into <reasoning>
NO_THINKING = "{% set enable_thinking = false %}"
# Gemma's and old Mistrals' refuse a system message, others drop it
NO_SYSTEM_ROLE = (
    "{% if messages[0]['role'] == 'system' and messages | length > 1 %}"
    "{% set first = (messages[0]['content'] + '\\n\\n' + messages[1]['content']) | trim %}"
    "{% set messages = [{'role': 'user', 'content': first}] + messages[2:] %}"
    "{% endif %}"
)
PARTS = [("system", "SYSTEM PART"), ("user", "USER PART"), ("assistant", "ASSISTANT PART")]


def adapt_template(tokenizer, model: str) -> None:
    """Makes `tokenizer` write the system prompt, ask for no thoughts, and end an answer with what ends a turn.

    What its template writes is all that is encoded: no second BOS. Raises UserError for a template that cannot be used.
    """
    try:
        tokenizer.chat_template = tokenizer.get_chat_template()  # of several the default one
        if not has_system_role(tokenizer):
            tokenizer.chat_template = NO_SYSTEM_ROLE + tokenizer.chat_template
        if write(tokenizer) != write(tokenizer, enable_thinking=False):
            tokenizer.chat_template = NO_THINKING + tokenizer.chat_template
        end = end_of_turn(tokenizer)
    except Exception as error:  # a template may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the chat template of {model} cannot write a question: {reason}") from error
    if end:  # Gemma's eos_token ends a text, and <end_of_turn> an answer
        tokenizer.eos_token = end
    if hasattr(tokenizer, "backend_tokenizer") and encode(tokenizer) != encode(tokenizer, add_special_tokens=False):
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])


def write(tokenizer, parts: int = 2, **options) -> str:
    """The first `parts` messages of a conversation, as the template writes them."""
    messages = [{"role": role, "content": content} for role, content in PARTS[:parts]]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=parts == 2, **options)


def has_system_role(tokenizer) -> bool:
    try:
        return "SYSTEM PART" in write(tokenizer)
    except Exception:  # as Gemma's: raise_exception('System role not supported')
        return False


def end_of_turn(tokenizer) -> str | None:
    """The token that the template writes behind an answer, None where it writes none."""
    rest = write(tokenizer, 3).rpartition("ASSISTANT PART")[2].lstrip()
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if rest.startswith(token.content)]
    return max(tokens, key=len, default=None)


def encode(tokenizer, **options) -> list[int]:
    return tokenizer("1", **options)["input_ids"]
