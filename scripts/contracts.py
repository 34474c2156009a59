"""An import contract that names what pure modules may import; everything else is refused, indirect imports included."""

from typing import Any

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class AllowListContract(Contract):
    """``modules`` (``package.*``: direct children) import each other and ``allowed`` modules only; ``exceptions`` are
    single imports, written ``importer -> imported``. As every import is on the list, so is every indirect one."""

    modules: Any = fields.SetField(subfield=fields.StringField())
    allowed: Any = fields.SetField(subfield=fields.StringField())
    exceptions: Any = fields.SetField(subfield=fields.StringField(), required=False)

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Kept when every import is on the list and every listed module exists."""
        pure = self._pure(graph)
        excepted = {tuple(one.split(" -> ")) for one in self.exceptions or ()}
        found = []
        for module in sorted(pure):
            if module not in graph.modules:
                found.append((module, "", "there is no such module"))
                continue
            for imported in sorted(graph.find_modules_directly_imported_by(module)):
                if not self._may_import(imported, pure) and (module, imported) not in excepted:
                    (detail, *_) = graph.get_import_details(importer=module, imported=imported)
                    found.append((module, imported, f"line {detail['line_number']}"))
        return ContractCheck(kept=not found, metadata={"found": found})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """One line for each import."""
        for module, imported, where in check.metadata["found"]:
            output.print_error(f"{module} -> {imported} ({where})" if imported else f"{module}: {where}", bold=False)

    def _pure(self, graph: ImportGraph) -> set[str]:
        named: set[str] = set()
        for one in self.modules:
            named |= graph.find_children(one[:-2]) if one.endswith(".*") else {one}
        return named

    def _may_import(self, imported: str, pure: set[str]) -> bool:
        return imported in pure or imported in self.allowed or imported.split(".")[0] in self.allowed
