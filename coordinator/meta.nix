# What packages say of their own limits: one set for each attribute, in order; 0 where an attribute says nothing.
# Attributes are found as `nix-instantiate -A` finds them: functions on the way are called with what --arg gives.
{ drover_file, drover_attrs, ... }@given:
let
  args = removeAttrs given [ "drover_file" "drover_attrs" ];
  call = value:
    if builtins.isFunction value then
      let
        wants = builtins.functionArgs value;
        fits = builtins.all (name: wants.${name} || args ? ${name}) (builtins.attrNames wants);
      in
      if wants == { } then (let tried = builtins.tryEval (value args); in if tried.success then tried.value else null)
      else if fits then call (value (builtins.intersectAttrs wants args))
      else null
    else if builtins.isAttrs value && value ? __functor then call (value.__functor value)
    else value;
  step = value: name:
    let here = call value; in
    if builtins.isAttrs here then here.${name} or null
    else if builtins.isList here && builtins.match "[0-9]+" name != null then
      let at = builtins.fromJSON name; in
      if at < builtins.length here then builtins.elemAt here at else null
    else null;
  # A meta that cannot be evaluated says nothing.
  number = value:
    let tried = builtins.tryEval (if builtins.isInt value && value > 0 then value else 0); in
    if tried.success then tried.value else 0;
  limits = path:
    let
      found = call (builtins.foldl' step (import drover_file) path);
      meta = if builtins.isAttrs found && (found.type or null) == "derivation" then found.meta or { } else { };
      said = name: number (meta.drover.${name} or 0);
    in
    {
      timeout_s = number (meta.timeout or 0);
      silence_s = number (meta.maxSilent or 0);
      log_bytes = said "logBytes";
      output_bytes = said "outputBytes";
      memory_bytes = said "memoryBytes";
    };
in
map limits drover_attrs
