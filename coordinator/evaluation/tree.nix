# The value that is evaluated, as a tree whose places are visited one by one, as `nix-instantiate` goes through it.
#
# Each visit prints one trace line, `TOKEN {…}`: a derivation with its output and what its `meta` says of limits (0
# where it says nothing), or the names below it, or that it is left out, or none of these. A node's value and children
# are lazy and kept, so that what a visit evaluates serves the next.
{ token, args, root, asked, maxDepth }:
let
  # What Nix does to a function on the way: it gets what --arg gives it and its own defaults. Only a pattern takes
  # arguments by name, and only toXML tells `{ }:` and `{ ... }:` from `x:`.
  call = value:
    if builtins.isFunction value then
      let
        written = builtins.substring 0 160 (builtins.toXML value);
        has = text: builtins.length (builtins.split text written) > 1;
        wants = builtins.functionArgs value;
        lacks = builtins.filter (name: !(wants.${name} || args ? ${name})) (builtins.attrNames wants);
      in
      if !has "<attrspat" then value
      else if lacks != [ ] then
        throw "cannot evaluate a function that has an argument without a value ('${builtins.head lacks}'); give it with --arg or --argstr"
      else call (value (if has "<attrspat ellipsis" then args else builtins.intersectAttrs wants args))
    else if builtins.isAttrs value && value ? __functor then call (value.__functor value)
    else value;

  # One attribute further down, as with `-A`: a number chooses from a list.
  select = { value, done }: name:
    let
      here = call value;
      whole = builtins.concatStringsSep "." (done ++ [ name ]);
      at = builtins.fromJSON name;
    in
    {
      done = done ++ [ name ];
      value =
        if builtins.match "[0-9]+" name != null then
          if !builtins.isList here then
            throw "the expression selected by the selection path '${whole}' should be a list but is a ${builtins.typeOf here}"
          else if at >= builtins.length here then throw "list index ${name} in selection path '${whole}' is out of range"
          else builtins.elemAt here at
        else if !builtins.isAttrs here then
          throw "the expression selected by the selection path '${whole}' should be a set but is a ${builtins.typeOf here}"
        else here.${name} or (throw "attribute '${name}' in selection path '${whole}' not found");
    };

  isDerivation = value: builtins.isAttrs value && (value.type or null) == "derivation";

  # A meta that cannot be evaluated says nothing.
  number = value:
    let tried = builtins.tryEval (if builtins.isInt value && value > 0 then value else 0); in
    if tried.success then tried.value else 0;

  node = given:
    let value = call given; in
    {
      inherit given value;
      children =
        if builtins.isList value then
          builtins.listToAttrs (builtins.genList
            (index: { name = toString index; value = node (builtins.elemAt value index); })
            (builtins.length value))
        else builtins.mapAttrs (_: node) value;
    };

  has = value: path:
    path == [ ] || (
      let here = call value; name = builtins.head path; in
      builtins.isAttrs here && here ? ${name} && has here.${name} (builtins.tail path)
    );

  # Of several paths the first that exists, or else the last, whose error then says what is missing.
  chosen = paths: if builtins.length paths == 1 || has root (builtins.head paths) then builtins.head paths
    else chosen (builtins.tail paths);

  roots = map (paths: node (builtins.foldl' select { value = root; done = [ ]; } (chosen paths)).value) asked;

  # Names of people, as far as they can be evaluated.
  maintainers = found:
    let
      nameOf = each:
        if builtins.isString each then each
        else if builtins.isAttrs each then each.github or each.name or each.email or null
        else null;
      all = found.meta.maintainers or [ ];
      names = builtins.filter builtins.isString (map nameOf (if builtins.isList all then all else [ ]));
      tried = builtins.tryEval (builtins.deepSeq names names);
    in
    if tried.success then tried.value else [ ];

  # Hydra and nix-eval-jobs look for constituents that are only named among all jobs, and make them inputs afterwards.
  # Built as it is, such an aggregate would succeed whatever becomes of them.
  namedConstituents = found:
    if found._hydraAggregate or false then
      builtins.filter (each: builtins.isString each && !builtins.hasContext each) (found.constituents or [ ])
    else [ ];

  # Names down from an aggregate to one that it leads to for the second time; null where there is none. Comparing
  # derivations would evaluate them, which has no end here: the deepest one is taken for it.
  aggregateRing = names: found:
    if !(builtins.isAttrs found && found._hydraAggregate or false) then null
    else if builtins.length names > 16 then names
    else builtins.foldl' (ring: each: if ring != null then ring else aggregateRing (names ++ [ found.name ]) each)
      null (found.constituents or [ ]);
  # The first name that comes again, up to where it does; empty where none does.
  ringOf = names:
    if names == [ ] then [ ] else
    let
      first = builtins.head names; rest = builtins.tail names;
      upTo = builtins.foldl' (all: name: if all.done then all else { done = name == first; names = all.names ++ [ name ]; })
        { done = false; names = [ first ]; } rest;
    in
    if builtins.elem first rest then upTo.names else ringOf rest;

  derivationAt = found:
    let
      limit = name: number (found.meta.drover.${name} or 0);
      named = namedConstituents found;
      down = aggregateRing [ ] found;
      ring = if down == null then [ ] else ringOf down;
      through = builtins.concatStringsSep ", " ring;
    in
    if ring != [ ] && builtins.head ring == builtins.head down then
      throw "the aggregate is a constituent of itself (${through}); take it out of one of them"
    else if ring != [ ] then
      throw "aggregates below this one are constituents of each other (${through}); take one out of the other"
    else
    if named != [ ] then
      throw "the aggregate names its constituent '${builtins.head named}', and only Hydra looks for names; list the derivation itself"
    else {
      drv = builtins.unsafeDiscardStringContext found.drvPath;
      output = found.outputName or "out";
      maintainers = maintainers found;
      limits = {
        timeout_s = number (found.meta.timeout or 0);
        silence_s = number (found.meta.maxSilent or 0);
        log_bytes = limit "logBytes";
        output_bytes = limit "outputBytes";
        memory_bytes = limit "memoryBytes";
      };
    };

  # A value that was asked for itself, or whose set asks to be entered.
  entered = value:
    if isDerivation value then derivationAt value
    else if builtins.isAttrs value then { names = builtins.attrNames value; }
    else if builtins.isList value then { elements = builtins.length value; }
    else throw "expression does not evaluate to a derivation (or a set or list of those)";

  # An attribute of a set. Nix passes over sets that do not ask to be entered.
  member = { given, value, ... }:
    if isDerivation given then derivationAt given
    else if !builtins.isAttrs given then { }
    else if given.recurseForDerivations or false then entered value
    else { left = true; };
  # The same places as a tree that nix-eval-jobs goes through. It knows neither lists nor names of other characters, takes
  # a number for an index, and passes over a set in silence: `#N` is an element, and what it would pass over is an error
  # with our own mark. What it prints of a derivation's meta is what a visit prints.
  marked = finding: throw "${token} ${builtins.toJSON finding}";
  job = found:
    let its = derivationAt found; in
    found // { meta = { inherit (its) output limits maintainers; }; };
  jobs = depth: value:
    if isDerivation value then job value
    else if depth >= maxDepth then marked { endless = true; }
    else if builtins.isAttrs value then
      let
        names = builtins.attrNames value;
        isBare = name: builtins.match "[A-Za-z_][-A-Za-z0-9_+]*" name != null;
        bare = builtins.filter isBare names;
        quoted = builtins.filter (name: !isBare name) names;
      in
      builtins.listToAttrs (map (name: { inherit name; value = memberJobs (depth + 1) value.${name}; }) bare)
      // (if quoted == [ ] then { } else { "#left" = marked { names = quoted; }; })
      // { recurseForDerivations = true; }
    else if builtins.isList value then
      builtins.listToAttrs (builtins.genList
        (index: { name = "#${toString index}"; value = jobs (depth + 1) (call (builtins.elemAt value index)); })
        (builtins.length value)) // { recurseForDerivations = true; }
    else entered value;
  memberJobs = depth: given:
    if isDerivation given then job given
    else if !builtins.isAttrs given then null
    else if given.recurseForDerivations or false then jobs depth (call given)
    else marked { left = true; };
in
{
  visit = entering: at: path:
    let
      found = builtins.foldl' (above: name: above.children.${name}) (builtins.elemAt roots at) path;
      finding = if entering then entered found.value else member found;
    in
    builtins.trace "${token} ${builtins.toJSON finding}" null;

  jobs = builtins.listToAttrs (builtins.genList
    (at: { name = "#${toString at}"; value = jobs 0 (builtins.elemAt roots at).value; })
    (builtins.length roots));
}
