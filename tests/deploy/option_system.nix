# A stand-in for the option system of nixpkgs, as far as the modules of infra/deploy/nix use it: options are declared
# with types, definitions are merged by priority, and a name without an option or a value of another type is an error.
# Nix itself evaluates it. `evaluate modules` returns the configuration.
let
  inherit (builtins) all any attrNames attrValues concatLists concatMap concatStringsSep elem elemAt filter foldl' hasAttr head
    isAttrs isBool isFloat isFunction isInt isList isString length listToAttrs mapAttrs match replaceStrings stringLength substring;

  show = path: concatStringsSep "." path;
  tagged = tag: value: isAttrs value && value._type or null == tag;

  simple = name: check: {
    inherit name check;
    merge = path: definitions:
      let value = (head definitions).value; in
      if length definitions > 1 then throw "The option `${show path}' has conflicting definitions."
      else if check value then value
      else throw "A definition for option `${show path}' is not of type `${name}'.";
  };
  each = outer: inner: path: definitions: map (one: inner.merge (path ++ [ outer ]) [ { value = one; } ]) (concatMap (one: one.value) definitions);

  types = rec {
    str = simple "string" isString;
    bool = simple "boolean" isBool;
    int = simple "signed integer" isInt;
    float = simple "floating point number" isFloat;
    package = simple "package" (value: isString value || isAttrs value);
    anything = simple "anything" (_: true);
    ints.unsigned = simple "unsigned integer" (value: isInt value && value >= 0);
    enum = values: simple "one of ${concatStringsSep ", " (map toString values)}" (value: elem value values);
    either = left: right: simple "${left.name} or ${right.name}" (value: left.check value || right.check value);
    addCheck = type: check: simple "${type.name} within its bounds" (value: type.check value && check value);
    nullOr = type: type // {
      name = "null or ${type.name}";
      check = value: value == null || type.check value;
      merge = path: definitions:
        if all (one: one.value == null) definitions then null else type.merge path definitions;
    };
    listOf = type: simple "list of ${type.name}" isList // {
      merge = path: definitions:
        if all (one: isList one.value) definitions then each "*" type path definitions
        else throw "A definition for option `${show path}' is not of type `list of ${type.name}'.";
    };
    attrsOf = type: simple "attribute set of ${type.name}" isAttrs // {
      merge = path: definitions:
        if all (one: isAttrs one.value) definitions then
          mapAttrs (name: value: type.merge (path ++ [ name ]) [ { inherit value; } ]) (foldl' (a: b: a // b) { } (map (one: one.value) definitions))
        else throw "A definition for option `${show path}' is not of type `attribute set of ${type.name}'.";
    };
    # What other modules of NixOS declare: sets are merged, the rest is taken as it is.
    freeform = simple "anything" (_: true) // { merge = path: definitions: mergeFree (map (one: one.value) definitions); };
    submodule = module: simple "submodule" isAttrs // {
      merge = path: definitions:
        if all (one: isAttrs one.value) definitions then configure path module.options (map (one: one.value) definitions)
        else throw "A definition for option `${show path}' is not of type `submodule'.";
    };
  };

  mergeFree = values:
    let flat = active (map (value: { inherit value; }) values); in
    if all (one: isAttrs one.value && !(one.value ? type && one.value.type == "derivation")) flat then
      mapAttrs (name: _: mergeFree (concatMap (one: if hasAttr name one.value then [ one.value.${name} ] else [ ]) flat)) (foldl' (a: b: a // b) { } (map (one: one.value) flat))
    else if all (one: isList one.value) flat then concatMap (one: one.value) flat
    else (head flat).value;

  # Definitions that count: conditions hold, and of priorities the strongest.
  active = definitions:
    let
      unfold = priority: value:
        if tagged "if" value then (if value.condition then unfold priority value.content else [ ])
        else if tagged "merge" value then concatMap (unfold priority) value.contents
        else if tagged "override" value then unfold value.priority value.content
        else [ { inherit priority value; } ];
      found = concatMap (one: unfold (one.priority or 100) one.value) definitions;
      strongest = foldl' (least: one: if one.priority < least then one.priority else least) 10000 found;
    in
    filter (one: one.priority == strongest) found;

  # The sets of a definition. A condition moves to each member, because it may depend on other members.
  sets = value:
    if tagged "if" value then map (mapAttrs (_: lib.mkIf value.condition)) (sets value.content)
    else if tagged "merge" value then concatMap sets value.contents
    else [ value ];

  configure = path: options: values:
    let
      definitions = concatMap sets values;
      unknown = concatMap (set: filter (name: !(hasAttr name options)) (attrNames set)) definitions;
      one = name: option:
        let
          here = path ++ [ name ];
          given = concatMap (set: if hasAttr name set then [ set.${name} ] else [ ]) definitions;
          strongest = active (map (value: { inherit value; }) given);
        in
        if !(tagged "option" option) then configure here option given
        else if option.type.name == "submodule" then option.type.merge here (map (value: { inherit value; }) (concatMap sets ([ (option.default or { }) ] ++ given)))
        else if strongest != [ ] then option.type.merge here strongest
        else option.default or (throw "The option `${show here}' is used but not defined.");
    in
    if unknown != [ ] then throw "The option `${show (path ++ [ (head unknown) ])}' does not exist." else mapAttrs one options;

  recursively = a: b: if isAttrs a && isAttrs b && !(tagged "option" a) then a // mapAttrs (name: value: if hasAttr name a then recursively a.${name} value else value) b else b;

  lib = {
    inherit types;
    inherit (builtins) concatLists mapAttrs concatMap;
    mkOption = option: option // { _type = "option"; };
    mkEnableOption = what: lib.mkOption { type = types.bool; default = false; description = "Whether to run ${what}."; };
    mkIf = condition: content: { _type = "if"; inherit condition content; };
    mkMerge = contents: { _type = "merge"; inherit contents; };
    mkDefault = content: { _type = "override"; priority = 1000; inherit content; };
    removePrefix = prefix: text: if lib.hasPrefix prefix text then substring (stringLength prefix) (stringLength text) text else text;
    hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;
    findFirst = holds: default: list: let found = filter holds list; in if found == [ ] then default else head found;
    filterAttrs = holds: set: listToAttrs (concatMap (name: if holds name set.${name} then [ { inherit name; value = set.${name}; } ] else [ ]) (attrNames set));
    mapAttrsToList = function: set: map (name: function name set.${name}) (attrNames set);
    optionals = condition: list: if condition then list else [ ];
    optionalAttrs = condition: set: if condition then set else { };
    concatMapStringsSep = separator: function: list: concatStringsSep separator (map function list);
    escapeShellArg = text: if match "[[:alnum:],._+:@%/-]+" text != null then text else "'${replaceStrings [ "'" ] [ "'\\''" ] text}'";
    importJSON = path: builtins.fromJSON (builtins.readFile path);
  };
in
{
  inherit lib;
  # `rest`: names of options of the system, beside those of the modules, with the values that they have.
  evaluate = { modules, rest }:
    let
      files = map (module: if isFunction module then module { inherit config lib pkgs; } else module) modules;
      options = foldl' recursively
        (mapAttrs (_: default: lib.mkOption { type = types.freeform; inherit default; }) rest)
        (map (file: file.options or { }) files);
      config = configure [ ] options ([ rest ] ++ map (file: file.config or (removeAttrs file [ "options" ])) files);
      pkgs.slirp4netns = "/slirp4netns-package";
      pkgs.formats.toml = _: { generate = name: value: "/nix/store/settings-as-json${builtins.toJSON value}"; };
    in
    config;
}
