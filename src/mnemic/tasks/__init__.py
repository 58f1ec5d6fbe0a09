"""Tasks with their floors: generators that yield tokens, labels and what is known about each example."""

from mnemic.tasks.babilong import BabilongTask
from mnemic.tasks.base import TASKS, Examples, Task, TaskCard
from mnemic.tasks.classification import Classification
from mnemic.tasks.copying import Copy, Reverse
from mnemic.tasks.facts import Episode, LanguageRecall, Question, RecallTask, SymbolRecall
from mnemic.tasks.interference import InterferenceTask
from mnemic.tasks.language import Language
from mnemic.tasks.mqar import MQAR
from mnemic.tasks.needle import NeedleTask
from mnemic.tasks.order import OrderTask
from mnemic.tasks.passkey import PasskeyTask
from mnemic.tasks.quadratic import Quadratic
from mnemic.tasks.recall import SentenceStreams, SymbolStreams
from mnemic.tasks.retrieval import Retrieval
from mnemic.tasks.rewrites import EmbeddedTask, RewritesTask
from mnemic.tasks.sorting import SortingTask
from mnemic.tasks.updates import UpdatesTask

__all__ = [
    "MQAR",
    "TASKS",
    "BabilongTask",
    "Classification",
    "Copy",
    "EmbeddedTask",
    "Episode",
    "Examples",
    "InterferenceTask",
    "Language",
    "LanguageRecall",
    "NeedleTask",
    "OrderTask",
    "PasskeyTask",
    "Quadratic",
    "Question",
    "RecallTask",
    "Retrieval",
    "Reverse",
    "RewritesTask",
    "SentenceStreams",
    "SortingTask",
    "SymbolRecall",
    "SymbolStreams",
    "Task",
    "TaskCard",
    "UpdatesTask",
]
