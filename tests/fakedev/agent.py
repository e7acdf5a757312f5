"""A translation agent for tests of endpoints: a dict of pages for each PASID, and everything that it was asked."""

from fakedev.dma import IDENTITY, NO_PASID, READ, WRITE, TranslationFault
from fakedev.machine import Machine
from fakedev.tlp import PRG_SUCCESS, Invalidation, PageResponse, Translation

PAGE = 4096


class Agent:
    """`pages[pasid][iova] = (pa, allowed)`; a PASID without a dict is refused, with or without ATS."""

    def __init__(self, bus):
        self.bus = bus
        self.pages = {NO_PASID: {}}
        self.seen = []
        self.page_requests = []
        self.ports = set()
        self.trusts_translated = True

    def _page(self, pasid, address):
        if pasid not in self.pages:
            raise TranslationFault
        return self.pages[pasid].get(address & -PAGE, (0, 0))

    def translate(self, port, pasid, address, length, access):
        self.ports.add(port)
        self.seen.append(("untranslated", pasid, address, access))
        pa, allowed = self._page(pasid, address)
        if access & (READ | WRITE) & ~allowed:
            raise TranslationFault
        start = address & -PAGE
        return start, start + PAGE, pa - start, allowed

    def translated(self, port, pasid, address, length, access):
        self.seen.append(("translated", pasid, address, access))
        if not self.trusts_translated:
            raise TranslationFault
        return IDENTITY

    def request_translation(self, port, pasid, address, access):
        self.seen.append(("translation request", pasid, address, access))
        pa, allowed = self._page(pasid, address)
        return Translation(address & -PAGE, PAGE, pa, allowed if access & WRITE else allowed & ~WRITE)

    def page_request(self, port, request):
        self.page_requests.append(request)

    # -- what a driver would have it do

    def map(self, iova, pa, allowed=READ | WRITE, pasid=NO_PASID):
        self.pages.setdefault(pasid, {})[iova] = (pa, allowed)

    def unmap(self, iova, rid, pasid=NO_PASID, invalidate=True):
        """Take a page away; True if the function completed the invalidation."""
        del self.pages[pasid][iova]
        for port in self.ports:
            port.forget()
        return invalidate and self.bus.invalidate(rid, Invalidation(pasid, iova, PAGE))

    def answer(self, code=PRG_SUCCESS, pasid=True):
        request = self.page_requests.pop(0)
        response = PageResponse(request.pasid if pasid else NO_PASID, request.group, code)
        assert self.bus.respond(request.rid, response)

    def kinds(self):
        seen, self.seen = self.seen, []
        return [kind for kind, *_ in seen]


class Bench:
    """A machine whose functions are behind an Agent."""

    def __init__(self):
        self.box = Machine("bench")
        self.memory = self.box.memory
        self.agent = Agent(self.box.root)

    def add(self, function):
        self.box.root.add(function, self.agent)
        function.config_write(4, 2, 6)
        return function
