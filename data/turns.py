"""Conversations as text, in the turns of Anthropic's HH-RLHF: "\\n\\nHuman: …\\n\\nAssistant: …".

Every conversation is written here: messages of a file, and a question to a model that was trained on turns.
Such a model's checkpoint has the template "turns"; one that was trained on plain text has "plain".
"""
from engine.files import short_repr

ROLES = {"system": "", "user": "\n\nHuman: ", "human": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
METADATA = {"meta", "metadata", "info", "tags", "source"}  # never part of a conversation, whatever they hold
# Fields in which others keep prompts. In other fields, a single word is taken for an id or a label.
PROMPT_NAMES = {"question", "query", "context", "history", "input", "instruction", "conversation",
                "conversations", "document", "post", "passage", "system_prompt"}


def render(messages, where):
    """Writes messages, [{"role": …, "content": …}, …], as one text; exits with one line if they are none."""
    turns = []
    for message in messages:
        try:
            turn = ROLES[message["role"]] + message["content"]
        except (KeyError, TypeError):
            raise SystemExit(f'{where}: a message must be {{"role": {" | ".join(ROLES)}, "content": text}}')
        for key, value in message.items():
            if key not in ("role", "content") and holds_text(key, value):
                raise SystemExit(f"{where}: a message holds text in {short_repr(key)}, which would be lost")
        if turns and message["role"] == "system":
            turn = "\n\n" + turn
        turns.append(turn)
    return "".join(turns)


def user_turn(content):
    """The prompt of a conversation in which the user has said `content`."""
    return render([{"role": "user", "content": content}], where="") + ASSISTANT


def template_of(prompts):
    """Returns "turns" if all prompts end with "\\n\\nAssistant:", else "plain"."""
    if prompts and all(prompt.endswith(ASSISTANT) for prompt in prompts):
        return "turns"
    return "plain"


def apply_template(template, prompts):
    """Writes prompts as a model of this template expects them; turns stay as they are."""
    if template == "plain":
        return prompts
    return [prompt if prompt.endswith(ASSISTANT) else user_turn(prompt) for prompt in prompts]


def holds_text(key, value):
    """Whether a field that no shape uses holds words that could belong to a prompt or a response."""
    if key in METADATA:
        return False
    if isinstance(value, str):
        is_phrase = len(value.split()) > 1 or not value.isascii()  # some scripts have no spaces
        return bool(value.strip()) and (is_phrase or key in PROMPT_NAMES)
    if isinstance(value, list):
        return any(holds_text(key, item) for item in value)
    if isinstance(value, dict):
        return any(holds_text(key, item) for item in value.values())
    return False
