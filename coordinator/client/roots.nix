# The derivations that attributes of a file stand for, as `nix-instantiate` finds them, each with its attribute and what
# its `meta` says of limits (0 where it says nothing).
#
# The answer is a flat list. A row is a derivation, `{ at; path; drv; output; … }`, or something that was left out,
# `{ at; path; left; }`; `at` is the index of the asked path, `path` goes on from it. Before anything of an attribute is
# evaluated, a trace line `TOKEN [at, path…]` says so: the last such line before an error names the attribute.
{ drover_file, drover_attrs, drover_token, ... }@given:
let
  args = removeAttrs given [ "drover_file" "drover_attrs" "drover_token" ];

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

  row = at: path: found:
    let said = name: number (found.meta.drover.${name} or 0); in
    {
      inherit at path;
      drv = builtins.unsafeDiscardStringContext found.drvPath;
      output = found.outputName or "out";
      limits = {
        timeout_s = number (found.meta.timeout or 0);
        silence_s = number (found.meta.maxSilent or 0);
        log_bytes = said "logBytes";
        output_bytes = said "outputBytes";
        memory_bytes = said "memoryBytes";
      };
    };

  marked = at: path: rows: builtins.trace "${drover_token} ${builtins.toJSON ([ at ] ++ path)}" (builtins.deepSeq rows rows);

  # Everything that a value stands for where it was asked for itself, or where its set says that it wants to be entered.
  inside = at: path: given:
    let value = call given; in
    if isDerivation value then [ (row at path value) ]
    else if builtins.isAttrs value then
      builtins.concatMap (name: marked at (path ++ [ name ]) (member at (path ++ [ name ]) name value.${name}))
        (builtins.attrNames value)
    else if builtins.isList value then
      builtins.concatLists (builtins.genList
        (index:
          let here = path ++ [ (toString index) ]; in
          marked at here (inside at here (builtins.elemAt value index)))
        (builtins.length value))
    else throw "expression does not evaluate to a derivation (or a set or list of those)";

  # An attribute of a set. Nix passes over names that it could not print, and over sets that do not ask to be entered.
  member = at: path: name: value:
    if builtins.match "[A-Za-z_][-A-Za-z0-9_+]*" name == null then [ { inherit at path; left = "name"; } ]
    else if isDerivation value then [ (row at path value) ]
    else if !builtins.isAttrs value then [ ]
    else if value.recurseForDerivations or false then inside at path value
    else [ { inherit at path; left = "set"; } ];
in
builtins.concatLists (builtins.genList
  (at:
    let path = builtins.elemAt drover_attrs at; in
    marked at [ ] (inside at [ ] (builtins.foldl' select { value = import drover_file; done = [ ]; } path).value))
  (builtins.length drover_attrs))
