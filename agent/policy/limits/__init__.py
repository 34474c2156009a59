"""Limits and budgets of API keys and providers, held by the whole rack without a shared store. Pure.

Every node holds a part of each limit; the parts of all nodes never sum to more than the limit. Nodes lend what they do
not need to those that do, by what their heartbeats tell. docs/limits.md says what that promises.
"""
