@echo off
rem Runs doit in the project's own .venv, which it sets up on first use:  doitw list
rem The same as the shell script doitw, which has the comments.

setlocal EnableExtensions DisableDelayedExpansion
set "LLAMA_PIPELINE_CWD=%CD%"
set "LLAMA_PIPELINE_COMMAND=%~0"
set "PYTHONPATH="
set "PYTHONHOME="
cd /d "%~dp0" || exit /b 1

set "MADE_IN="
if not exist .venv\Scripts\python.exe goto set_up
if not exist .venv\root goto set_up
fc /b requirements\run.txt .venv\run.txt >nul 2>&1 || goto set_up
rem Letters beyond ASCII may be read differently here; then bootstrap.py looks, and finds all well.
set /p MADE_IN=<.venv\root
if /i "%MADE_IN%"=="%CD%" goto run_doit

:set_up
set "FOUND="
if not defined PYTHON goto search
call :try "%PYTHON%"
if defined FOUND goto bootstrap
>&2 echo doitw: PYTHON=%PYTHON% is not Python 3.11 or later. Unset it, or name another one.
exit /b 1

:search
call :try py -3
if not defined FOUND call :try python
if defined FOUND goto bootstrap
where uv >nul 2>&1 || goto no_python
set FOUND=uv run --no-project --isolated --python ">=3.11" python

:bootstrap
%FOUND% -I pipeline\bootstrap.py || exit /b 1

:run_doit
.venv\Scripts\python.exe -m pipeline %*
exit /b %ERRORLEVEL%

:no_python
>&2 echo doitw: found no Python 3.11 or later. Install one, then call doitw again:
>&2 echo   winget install Python.Python.3.12
>&2 echo or install uv, which fetches a Python by itself.
exit /b 1

rem Without quotes around the whole, since a path in it has its own.
:try
%* -c "import sys; sys.exit(sys.version_info < (3, 11))" >nul 2>&1 && set FOUND=%*
exit /b 0
