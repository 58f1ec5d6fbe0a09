"""Tasks with their floors: generators that yield tokens, labels and what is known about each example."""

from mnemic.tasks.recall import Episode, LanguageRecall, Question, RecallTask, SymbolRecall

__all__ = ["Episode", "LanguageRecall", "Question", "RecallTask", "SymbolRecall"]
