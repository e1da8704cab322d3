# cmake -DNM=... -DOBJECTS=... -P unmerged.cmake: fails where an object file defines code that the
# linker may replace by that of another one (a weak symbol, such as an inline function of the C++
# library that was not inlined).
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" merged "${symbols}")
  list(FILTER merged EXCLUDE REGEX "DW\\.ref\\.__gxx_personality_v0")  # a pointer
  list(FILTER merged INCLUDE REGEX "^[0-9a-fA-F]")                      # is defined here
  if(merged)
    message(FATAL_ERROR "${object} shares code with the other instruction sets:\n${merged}")
  endif()
endforeach()
