"""Tasks with their floors: generators that yield tokens, labels and what is known about each example."""

from mnemic.tasks.base import TASKS, Examples, Task, TaskCard
from mnemic.tasks.recall import Episode, LanguageRecall, Question, RecallTask, SymbolRecall

__all__ = [
    "TASKS",
    "Episode",
    "Examples",
    "LanguageRecall",
    "Question",
    "RecallTask",
    "SymbolRecall",
    "Task",
    "TaskCard",
]
